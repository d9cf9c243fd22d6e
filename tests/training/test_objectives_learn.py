"""Each self-supervised objective lowers its own loss on real data within seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from processive import bio, chem
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.backbones.formats.prot_xlstm import TOKENIZER
from processive.models import LanguageModel, TaskHead
from processive.sequences import PackedBatch, tokenizer_from_dict
from processive.training import TrainingConfig, objectives, read_metrics, read_recipe, step, train

PROTEINS = Path(__file__).parents[2] / "examples" / "proteins.fasta"


@pytest.fixture(scope="module")
def molecules():
    """RDKit's NCI strings, the first 400, and their tokenizer."""
    config = pytest.importorskip("rdkit.RDConfig")
    records = chem.read(Path(config.RDDataDir) / "NCI" / "first_5K.smi").checked("skip")[:400]
    tokenizer = chem.make_tokenizer({"name": "smiles"}, records)
    return tokenizer, chem.tokenize(records, tokenizer)


@pytest.mark.parametrize(
    ("objective", "gain"),
    [("masked", 0.4), ("span-masked", 0.12), ("swapped", 0.02)],  # a swapped token must be found before it is guessed
)
def test_masks_spans_and_swaps(objective, gain, molecules, tmp_path):
    tokenizer, sequences = molecules
    config = TransformerConfig(len(tokenizer.vocabulary), 48, 2, heads=4, direction="bidirectional")
    model = LanguageModel(tokenizer, config)
    settings = TrainingConfig(objective=objective, steps=200, batch_tokens=600, learning_rate=3e-3, validate_every=200)
    unigram = entropy(sequences, tokenizer)
    metrics = train(model, sequences[:340], settings, out=tmp_path, validation=sequences[340:], progress=False)
    assert metrics["validation_loss"] < unigram - gain  # nats, of 2.0


def entropy(sequences, tokenizer) -> float:
    tokens = np.concatenate(sequences)
    counts = np.bincount(tokens[~np.isin(tokens, list(tokenizer.vocabulary.special_ids))])
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_fill_in_of_proteins(tmp_path):
    tokenizer = tokenizer_from_dict(TOKENIZER)
    sequences = bio.tokenize(bio.read(PROTEINS), tokenizer)
    model = LanguageModel(tokenizer, XLSTMConfig(len(tokenizer.vocabulary), 32, 2, heads=2, rotary="width"))
    settings = TrainingConfig(objective="fill-in", steps=40, batch_tokens=600, learning_rate=1e-2, log_every=1)
    train(model, sequences, settings, out=tmp_path, progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] > 3.3 and np.mean(losses[-5:]) < 2.8


def test_blanks_of_proteins(tmp_path):
    recipe = read_recipe("xtrimopglm", overrides={"training.steps": 50, "training.batch_tokens": 800})
    tokenizer = bio.make_tokenizer(recipe.tokenizer)
    model = recipe.build(tokenizer)
    sequences = bio.tokenize(bio.read(PROTEINS), tokenizer)
    train(model, sequences, recipe.training, out=tmp_path, progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] > 2.8 and losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("kind", ["uniform", "clusters", "generator"])
def test_detectors(kind, molecules):
    """A detector finds replaced tokens better than their share alone, and every label it learned from was right."""
    tokenizer, sequences = molecules
    vocabulary = tokenizer.vocabulary
    torch.manual_seed(0)
    config = TransformerConfig(len(vocabulary), 48, 2, heads=4, direction="bidirectional")
    model, head = LanguageModel(tokenizer, config), TaskHead(48, 1, level="token", dropout=0.0)
    guesser = LanguageModel(tokenizer, TransformerConfig(len(vocabulary), 24, 1, heads=2, direction="bidirectional"))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters(), *guesser.parameters()], 4e-3)
    clusters = torch.arange(len(vocabulary)) % 4
    counts = torch.ones(4, 4)
    losses, chance = [], []
    for number in range(400 if kind == "generator" else 60):  # its guesses are hard to tell
        generator = torch.Generator().manual_seed(number)
        picked = np.random.default_rng(number).choice(len(sequences), 25, replace=False)
        batch = PackedBatch.from_sequences([sequences[i] for i in picked])
        other = torch.zeros(())
        if kind == "generator":
            guess = objectives.masked(batch, vocabulary, generator)
            other = step.loss_sum(guesser, guess) / guess.weight
            with torch.no_grad():
                logits = guesser(guess.batch)[0][guess.weights > 0]
            found = objectives.sampled(guess, logits, vocabulary, generator)
        elif kind == "clusters":
            found = objectives.cluster_replaced(batch, vocabulary, generator, clusters=clusters, counts=counts)
        else:
            found = objectives.replaced(batch, vocabulary, generator)
        assert torch.equal(found.batch.tokens != batch.tokens, found.targets == 1)
        answers = head(model.backbone(found.batch)[0], found.batch, vocabulary)
        labels = torch.where(found.weights > 0, found.targets.float(), torch.nan)
        total, weight = objectives.binary_loss(answers, labels[:, None])
        loss = total / weight
        optimizer.zero_grad()
        (other + (objectives.DETECTOR_WEIGHT if kind == "generator" else 1) * loss).backward()
        optimizer.step()
        wrong = (answers[:, 0] > 0) != (found.targets == 1)
        counts = objectives.count_confusions(counts, clusters, batch.tokens, found.batch.tokens, wrong)
        share = float((labels == 1).sum() / weight)
        losses.append(loss.item())
        chance.append(-share * np.log(share) - (1 - share) * np.log(1 - share))
    assert np.mean(losses[-20:]) < np.mean(chance[-20:]) - 0.02
