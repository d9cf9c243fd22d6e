"""Models that read a prefix: embedded and scored as masked models are, and written by into a blank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig
from processive.bio.letters import LetterTokenizer
from processive.errors import ConfigError, InputError
from processive.inference import (
    embed,
    generate,
    log_likelihood,
    logits,
    position_log_probabilities,
    predict,
    pseudo_log_likelihood,
    score,
)
from processive.inference.sampling import draw, filtered, uniforms
from processive.inference.starts import starts_of
from processive.models import LanguageModel, TaskConfig, add_task
from processive.sequences import PackedBatch, blanked
from processive.training import Labelled, TrainingConfig, train
from processive.training.preferences import WildType, log_likelihoods

LETTERS = "LAGVSERT"
SPECIALS = ("<pad>", "<mask>", "<gmask>", "<smask>", "<sop>", "<eop>", "<eos>")
POSITIONS = ["rotary", "rotary-2d"]


def make_tokenizer(*, letters=LETTERS, without=()):
    tokens = [token for token in (*SPECIALS, *letters) if token not in without]
    return LetterTokenizer(tokens, roles={"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}, after=["<eos>"])


def make(positions="rotary", *, direction="prefix", tokenizer=None, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    size = len(tokenizer.vocabulary)
    model = LanguageModel(
        tokenizer, TransformerConfig(size, 16, 2, heads=2, direction=direction, positions=positions, **options)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def words(rng):
    return ["".join(rng.choice(list(LETTERS), rng.integers(1, 21))) for _ in range(12)]


def read_by_hand(model, first, last, written):
    """The logits after the last token of a blank between two texts, everything read at once."""
    ids, mask = model.vocabulary.ids, "<smask>" if last else "<gmask>"
    prefix = [*first, mask, *last, "<eos>"]
    behind = ["<sop>", *written]
    blocks = [0] * len(prefix) + list(range(1, len(behind) + 1))
    places = [*range(len(prefix)), *(len(first) + block for block in range(1, len(behind) + 1))]
    batch = PackedBatch(
        torch.tensor([ids[token] for token in (*prefix, *behind)]),
        torch.tensor([0, len(places)]),
        torch.tensor(places),
        {"prefix": torch.tensor([len(prefix)])},
        block_positions=torch.tensor(blocks),
    )
    with torch.inference_mode():
        return model(batch)[0][-1:]


def slowly(model, count, first, last, *, max_length, seed):
    vocabulary, results = model.vocabulary, []
    banned = torch.tensor([token in SPECIALS and token != "<eop>" for token in vocabulary.tokens])
    for number in range(count):
        written = []
        for step in range(max_length):
            chances = filtered(read_by_hand(model, first, last, written).masked_fill(banned, -torch.inf))
            token = vocabulary.tokens[int(draw(chances, torch.from_numpy(uniforms(seed, np.array([number]), step))))]
            if token == "<eop>":
                break
            written.append(token)
        results.append(first + "".join(written) + last)
    return results


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("first", "last"), [("LAG", ""), ("", ""), ("LAG", "RT"), ("", "VS")])
def test_generates_as_the_slow_way_does(positions, first, last):
    model = make(positions)
    wanted = slowly(model, 6, first, last, max_length=12, seed=3)
    assert len(set(wanted)) > 3
    assert generate(model, 6, prompts=first, suffixes=last or None, max_length=12, seed=3) == wanted
    if not first and not last:
        assert generate(model, 6, max_length=12, seed=3) == wanted


def test_what_is_read_by_hand():
    model = make()
    (start,) = starts_of(model, "LA", "G", None, 9)
    ids = model.vocabulary.ids
    assert start.read.tokens.tolist() == [ids[t] for t in ("L", "A", "<smask>", "G", "<eos>", "<sop>")]
    assert start.read.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert start.read.block_positions.tolist() == [0, 0, 0, 0, 0, 1]
    assert start.read.prefix == 5
    (start,) = starts_of(model, None, None, None, 9)
    assert start.read.tokens.tolist() == [ids[t] for t in ("<gmask>", "<eos>", "<sop>")]
    assert start.read.positions.tolist() == [0, 1, 1] and start.read.prefix == 2


def test_does_not_depend_on_the_batch_size_and_keeps_the_order():
    model = make("rotary-2d")
    prompts, suffixes = ["LAG", "", "T"], ["R", "SE", ""]
    wanted = generate(model, 7, prompts=prompts, suffixes=suffixes, max_length=15)
    assert len({len(text) for text in wanted}) > 5  # they end at different times, so finished ones are dropped
    assert generate(model, 7, prompts=prompts, suffixes=suffixes, max_length=15, batch_size=4) == wanted
    for number, (first, last) in enumerate(zip(prompts, suffixes, strict=True)):
        assert all(text.startswith(first) and text.endswith(last) for text in wanted[7 * number : 7 * number + 7])
    each = [generate(model, prompts="L", suffixes=last, max_length=4, temperature=0)[0] for last in suffixes[:2]]
    assert generate(model, prompts="L", suffixes=suffixes[:2], max_length=4, temperature=0) == each


def test_stop_and_max_length():
    model = make()
    assert max(map(len, generate(model, 40, prompts="LA", max_length=3))) == 5
    plain = generate(model, 20, max_length=12)
    assert any("A" in text for text in plain)
    assert generate(model, 20, max_length=12, stop="A") == [text.split("A")[0] for text in plain]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_read_with_a_cache_is_read_whole(positions, order):
    """Prefix, <sop> and then token after token, of two sequences with blanks that are written in either order."""
    model = make(positions).double()
    ids = np.asarray(model.tokenizer.encode("LAGVSERT"), np.int64)
    other = np.asarray(model.tokenizer.encode("TRV"), np.int64)
    made = [
        blanked(ids, [(1, 3), (5, 6)], "<smask>", model.vocabulary, order=order),
        blanked(other, [(0, 3)], "<gmask>", model.vocabulary),
    ]
    for one in made:

        def piece(start, end, one=one):
            return PackedBatch(
                torch.from_numpy(one.tokens[start:end]),
                torch.tensor([0, end - start]),
                torch.from_numpy(one.positions[start:end]),
                {} if start else {"prefix": torch.tensor([one.prefix])},
                block_positions=torch.from_numpy(one.block_positions[start:end]),
            )

        with torch.inference_mode():
            whole, _ = model.backbone(piece(0, len(one.tokens)))
            hidden, state = model.backbone(piece(0, one.prefix), return_state=True)
            parts = [hidden]
            for at in range(one.prefix, len(one.tokens)):
                hidden, state = model.backbone(piece(at, at + 1), state, return_state=True, reuse_state=True)
                parts.append(hidden)
        assert (torch.cat(parts) - whole).abs().max() <= 1e-12
        lengths = [one.prefix, *[1] * (len(one.tokens) - one.prefix)]
        assert state.lengths.tolist() == [sum(lengths)]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_whole_sequence_is_read_as_by_an_encoder(positions, words):
    model, encoder = make(positions), make(positions, direction="bidirectional")
    for one in (model, encoder):
        add_task(one, TaskConfig("regression", ("tm",)))
    both = PackedBatch.from_sequences([model.tokenizer.encode(text) for text in ("LAS", "GVS")]), np.arange(2)
    wild = WildType(np.asarray(model.tokenizer.encode("LVS"), np.int64), "masked-marginal")
    for verb in (
        lambda m: embed(m, [*words, None]),
        lambda m: np.concatenate(embed(m, words, layer=1, pooling="tokens", batch_tokens=10)),
        lambda m: score(m, words[:4]),
        lambda m: pseudo_log_likelihood(m, [*words[:3], None, ""]),
        lambda m: np.concatenate(logits(m, words)),
        lambda m: position_log_probabilities(m, words[0], [0], masked=True),
        lambda m: position_log_probabilities(m, words[0], [0], masked=False),
        lambda m: predict(m, words),
        lambda m: Labelled.encode(m.tokenizer, ["LAS", "GVS"], [0.5, 2.0]).objective(*both, m).loss_sum(m).detach(),
        lambda m: log_likelihoods(m, both[0], wild).detach(),
    ):
        np.testing.assert_array_equal(verb(model), verb(encoder))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_log_likelihood_is_that_of_what_is_written(positions, batch_tokens, words):
    model = make(positions)
    given = [*words[:4], ""]
    wanted = []
    for word in given:
        total = 0.0
        for t, token in enumerate([*word, "<eop>"]):
            logs = read_by_hand(model, "", "", word[:t]).double().log_softmax(-1)
            total += float(logs[0, model.vocabulary.ids[token]])
        wanted.append(total)
    found = log_likelihood(model, [*given, None], batch_tokens=batch_tokens)
    assert np.isnan(found[-1])
    np.testing.assert_allclose(found[:-1], wanted, atol=1e-5, rtol=1e-6)


def test_what_is_refused(make_model):
    model = make()
    with pytest.raises(ConfigError, match="2 prompts and 3 suffixes"):
        generate(model, prompts=["L", "A"], suffixes=["G", "V", "S"])
    with pytest.raises(InputError, match="suffix 2, position 1: 'J'"):
        generate(model, prompts="L", suffixes=["A", "J"])
    with pytest.raises(InputError, match="prompt 1, position 2: 'J'"):
        generate(model, prompts="LJ")
    with pytest.raises(ConfigError, match="This one is causal"):
        generate(make_model("decoder"), prompts="a", suffixes="b")
    with pytest.raises(ConfigError, match="bidirectional"):
        generate(make(direction="bidirectional"))
    poor = make(tokenizer=make_tokenizer(without=["<sop>"]))
    for verb in (lambda: generate(poor), lambda: log_likelihood(poor, ["LA"])):
        with pytest.raises(ConfigError, match="lacks <sop>"):
            verb()
    assert np.isfinite(embed(poor, ["LA"])).all() and np.isfinite(score(poor, ["LA"])).all()


ORDER = "LAGVSERTIDPKQNFY"


@pytest.mark.slow
def test_a_trained_model_goes_on_and_fills_in(tmp_path):
    """It reads stretches of one order of letters, so that what lies between two of them is known, and what follows."""
    tokenizer, rng = make_tokenizer(letters=ORDER), np.random.default_rng(0)
    pairs = np.sort(rng.integers(0, 17, (600, 2)), axis=1)
    stretches = [ORDER[begin:end] for begin, end in pairs.tolist() if end >= begin + 4]
    config = TransformerConfig(len(tokenizer.vocabulary), 32, 2, heads=2, direction="prefix", positions="rotary-2d")
    torch.manual_seed(0)
    model = LanguageModel(tokenizer, config)
    settings = TrainingConfig(objective="glm", steps=500, batch_tokens=512, learning_rate=5e-3, mask_share=0.3)
    train(model, [tokenizer.encode(text) for text in stretches], settings, out=tmp_path)
    firsts, lasts = ["LAGV", "AGVS", "TIDP"], ["RTI", "RTID", "NFY"]
    wanted = ["LAGVSERTI", "AGVSERTID", "TIDPKQNFY"]
    assert generate(model, prompts=firsts, suffixes=lasts, temperature=0) == wanted
    goes_on = generate(model, 20, prompts=["AGVS", "ERTI"], max_length=20)
    assert sum(text in ORDER for text in goes_on) >= 36
    for verb in (score, log_likelihood):
        right, wrong = verb(model, ["GVSERTIDP", "GVSETRIDP"])
        assert right > wrong + 5
