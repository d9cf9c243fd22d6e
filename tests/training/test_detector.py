"""RTS through the loop: a task head tells replaced tokens; by hand, learned, saved, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processive import bio
from processive.errors import ConfigError
from processive.inference import predict
from processive.models import TaskConfig, add_task, load
from processive.sequences import PackedBatch
from processive.training import TrainingConfig, add_detector, read_metrics, read_recipe, step, train
from processive.training.carried import Carried
from processive.training.optimizer import make_optimizer
from processive.training.passes import Direct

PROTEINS = Path(__file__).parents[2] / "examples" / "proteins.fasta"


def test_the_loss_by_hand(make_model, tokenizer):
    model = make_model("masked", dropout=0.0)
    add_task(model, TaskConfig("binary", ("replaced",), level="token", dropout=0.0))
    config = TrainingConfig(objective="replaced", steps=1, mask_share=0.5, clip=0.0)
    batch = PackedBatch.from_sequences([tokenizer.encode(word) for word in ("abcdefgh", "dd")])
    found = step.make_objective(batch, model, config, step.MASKS, 0, 0)
    changed = found.batch.tokens != batch.tokens
    ordinary = batch.tokens >= 4
    assert 0 < changed.sum() < 10 and not (changed & ~ordinary).any()
    assert found.weight == 10  # each letter is asked about
    answers = model.task(model.backbone(found.batch)[0], found.batch, model.vocabulary)[:, 0]
    by_hand = torch.where(changed, -F.logsigmoid(answers), -F.logsigmoid(-answers))[ordinary].mean()
    given = Direct(model), make_optimizer(model, config), [(0, found, True)], config, Carried()
    loss, _ = step.gradient_step(*given, step=0)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.slow
def test_a_recipe_of_detectors_learns_and_is_kept(tmp_path):
    overrides = {"training.objective": "replaced", "training.steps": 60, "training.batch_tokens": 800}
    small = {"backbone.width": 48, "backbone.depth": 2, "training.learning_rate": 5e-3}
    recipe = read_recipe("protein-encoder", overrides=overrides | small)
    tokenizer = bio.make_tokenizer(recipe.tokenizer)
    model = recipe.build(tokenizer)
    language = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    sequences = bio.tokenize(bio.read(PROTEINS), tokenizer)
    metrics = train(model, sequences, recipe.training, out=tmp_path, validation=sequences, progress=False)
    chance = -(0.15 * np.log(0.15) + 0.85 * np.log(0.85))
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] > chance and np.mean(losses[-10:]) < chance - 0.08
    assert metrics["validation_loss"] < chance - 0.03
    assert all(torch.equal(model.head.state_dict()[name], tensor) for name, tensor in language.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    back = load(tmp_path)
    true = bio.read(PROTEINS)[0].text
    wrong = f"{true[:30]}W{true[31:]}"  # an isoleucine of ubiquitin
    one, other = predict(back, [true, wrong])
    assert one.shape == (76,) and other[30] > one[30]


def test_what_is_refused(make_model, sequences, tmp_path):
    config = TrainingConfig(objective="replaced", steps=1)

    def refused(model, match):
        with pytest.raises(ConfigError, match=match):
            train(model, sequences, config, out=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    model = make_model("masked")
    refused(model, "the model has none")
    add_task(model, TaskConfig("binary", ("active",)))
    refused(model, "has another task head")
    causal = make_model()
    add_detector(causal)
    refused(causal, "do not fit")
