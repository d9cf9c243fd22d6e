# Two commands: `make demo` and `make test`. Each sets up the virtual environment once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage lint types imports tutorials wheel clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py --out demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Apart, since it takes nearly twice as long.
coverage: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --cov=processive --cov-report=term --cov-fail-under=85

$(VENV)/.ready: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard kernels/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,test,tutorials]'
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers and the import contract read the package as users get it: from the wheel.
build/wheel/.ready: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	touch $@

wheel: build/wheel/.ready

# mypy's joins of types follow the order of sets: a fixed hash seed gives the same answer on every machine.
types: build/wheel/.ready
	PYTHONHASHSEED=0 MYPYPATH=build/wheel $(BIN)/mypy -p processive

imports: build/wheel/.ready
	PYTHONPATH=build/wheel $(BIN)/lint-imports

tutorials: $(VENV)/.ready
	$(BIN)/jupyter execute --timeout=300 tutorials/*.ipynb

clean:
	rm -rf build dist demo $(VENV)
