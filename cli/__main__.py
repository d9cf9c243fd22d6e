"""``python -m processive.cli``: how the processes of a run are started."""

from . import main

raise SystemExit(main())
