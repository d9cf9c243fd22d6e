"""Strings to RDKit molecules, one by one with the reason when it fails, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError, needs

if TYPE_CHECKING:
    from rdkit.Chem import Mol


def parse_smiles(smiles: str) -> Mol:
    """Return the sanitised RDKit molecule of ``smiles``, without RDKit's own messages on stderr.

    Raises:
        InputError: it is no molecule, with RDKit's reason (or, where RDKit tells none, what its syntax lacks).
    """
    with needs("chem"):
        from rdkit import Chem, rdBase
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is not None and molecule.GetNumAtoms():
            return molecule
        loose = Chem.MolFromSmiles(smiles, sanitize=False)
        problems = () if loose is None else Chem.DetectChemistryProblems(loose)
    if problems:
        raise InputError(f"{_shown(smiles)} is not a molecule: {problems[0].Message().strip().rstrip('.')}.")
    reason, position = _syntax_problem(smiles)
    raise InputError(f"{_shown(smiles)} is not a molecule: {reason}.", position=position)


def parse_all(smiles: Sequence[str]) -> list[Mol | None]:
    """RDKit molecules of many strings, None where a string is no molecule."""
    with needs("chem"):
        from rdkit import Chem, rdBase
    with rdBase.BlockLogs():
        found = [Chem.MolFromSmiles(text) if text else None for text in smiles]
    return [molecule if molecule is not None and molecule.GetNumAtoms() else None for molecule in found]


def canonical(molecules: Sequence[Mol | None]) -> list[str | None]:
    """RDKit's canonical SMILES of each molecule, None for None."""
    with needs("chem"):
        from rdkit.Chem import MolToSmiles
    return [None if molecule is None else MolToSmiles(molecule) for molecule in molecules]


def canonical_smiles(smiles: Sequence[str]) -> list[str | None]:
    """RDKit's canonical SMILES of each string, None where a string is no molecule."""
    return canonical(parse_all(smiles))


def _shown(smiles: str) -> str:
    return repr(smiles if len(smiles) <= 60 else f"{smiles[:57]}...")


def _syntax_problem(smiles: str) -> tuple[str, int | None]:
    """What the syntax of ``smiles`` lacks and where (from 1); RDKit says so only on stderr."""
    if not smiles:
        return "the string is empty", None
    branches: list[int] = []
    rings: dict[str, int] = {}
    bracket = False
    position = 0
    while position < len(smiles):
        character, start = smiles[position], position + 1
        position += 1
        if character in "[]":
            bracket = character == "["
        elif bracket:
            continue
        elif character == "(":
            branches.append(start)
        elif character == ")":
            if not branches:
                return "a parenthesis is closed that was not opened", start
            branches.pop()
        elif character.isdigit() or character == "%":
            label = character
            if character == "%":
                end = smiles.find(")", position) + 1 if smiles.startswith("(", position) else position + 2
                label = smiles[position:end].strip("()")
                position = max(end, position)
            if rings.pop(label.lstrip("0") or "0", None) is None:
                rings[label.lstrip("0") or "0"] = start
    if branches:
        return "the parenthesis opened here is not closed", branches[-1]
    if rings:
        label, start = next(iter(rings.items()))
        return f"the ring bond {label} opened here is not closed", start
    return "RDKit cannot parse it", None
