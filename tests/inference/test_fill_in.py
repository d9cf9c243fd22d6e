"""Gaps between a prompt and a suffix, filled in by a causal model that was trained to (Prot-xLSTM)."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.bio.letters import LetterTokenizer
from processive.errors import ConfigError, InputError
from processive.inference import generate
from processive.inference.sampling import draw, filtered, uniforms
from processive.inference.starts import starts_of
from processive.models import LanguageModel
from processive.sequences import PackedBatch, move_spans_behind
from processive.training import TrainingConfig, train
from processive.training.objectives import fill_in

LETTERS = "LAGVSERT"
MASKS = tuple(f"<mask-{i}>" for i in range(1, 6))
SPECIALS = ("<cls>", "<pad>", "<eos>", "<mask>", *MASKS)
XLSTM = {"blocks": ("mlstm", "slstm"), "rotary": "width"}
KINDS = {
    "xlstm": (XLSTMConfig, XLSTM),
    "rotary": (TransformerConfig, {}),
    "absolute": (TransformerConfig, {"positions": "absolute", "max_positions": 64}),
}


def make_tokenizer(without=(), after=()):
    roles = {"bos": "<cls>", "eos": after[0] if after else "<cls>", "pad": "<pad>", "mask": "<mask>"}
    tokens = [token for token in (*SPECIALS, *LETTERS) if token not in without]
    return LetterTokenizer(tokens, roles=roles, before=["<cls>"], after=after)


def make(kind="xlstm", *, tokenizer=None, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    config, own = KINDS[kind]
    model = LanguageModel(tokenizer, config(len(tokenizer.vocabulary), 16, 2, heads=2, **{**own, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def ids(model, text):
    return [model.vocabulary.ids[token] for token in text.split()]


def read_by_hand(model, first, last, gap, written):
    """The logits after what has been written into a gap, everything read at once."""
    tokens = ["<cls>", *first, "<mask-1>", *last, "<eos>", "<mask-1>", *written]
    at = len(first) + 1
    places = [*range(at), at, *range(at + gap, at + gap + len(last)), 0, at, *range(at, at + len(written))]
    batch = PackedBatch(
        torch.tensor([model.vocabulary.ids[token] for token in tokens]),
        torch.tensor([0, len(tokens)]),
        torch.tensor(places),
    )
    with torch.inference_mode():
        return model(batch)[0][-1:]


def slowly(model, count, first, last, gap, *, start=0, seed=0):
    banned, results = torch.tensor([token in SPECIALS for token in model.vocabulary.tokens]), []
    for number in range(start, start + count):
        written = []
        for step in range(gap):
            chances = filtered(read_by_hand(model, first, last, gap, written).masked_fill(banned, -torch.inf))
            token = int(draw(chances, torch.from_numpy(uniforms(seed, np.array([number]), step))))
            written.append(model.vocabulary.tokens[token])
        results.append(first + "".join(written) + last)
    return results


def test_what_is_read_by_hand():
    model = make()
    (start,) = starts_of(model, "LAG", "RT", 2, 9)
    assert start.read.tokens.tolist() == ids(model, "<cls> L A G <mask-1> R T <eos> <mask-1>")
    assert start.read.positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 0, 4]
    assert list(start.places) == [4, 5]
    (start,) = starts_of(model, "LA", None, 3, 9)
    assert start.read.tokens.tolist() == ids(model, "<cls> L A <mask-1> <eos> <mask-1>")
    assert start.read.positions.tolist() == [0, 1, 2, 3, 0, 3] and list(start.places) == [3, 4, 5]
    (start,) = starts_of(model, None, "V", 1, 9)
    assert start.read.tokens.tolist() == ids(model, "<cls> <mask-1> V <eos> <mask-1>")
    assert start.read.positions.tolist() == [0, 1, 2, 0, 1] and list(start.places) == [1]
    ended = make(tokenizer=make_tokenizer(after=["<eos>"]))
    (start,) = starts_of(ended, "L", "V", 2, 9)
    assert start.read.tokens.tolist() == ids(model, "<cls> L <mask-1> V <eos> <eos> <mask-1>")
    assert start.read.positions.tolist() == [0, 1, 2, 4, 5, 0, 2]


@pytest.mark.parametrize("after", [(), ("<eos>",)])
@pytest.mark.parametrize(("first", "gap", "last"), [("LAG", "VS", "ERT"), ("", "LA", "G"), ("LAG", "V", "")])
def test_it_is_what_training_reads(monkeypatch, first, gap, last, after):
    model = make(tokenizer=make_tokenizer(after=after))
    span = 1 + len(first), 1 + len(first + gap)
    monkeypatch.setattr(
        sys.modules["processive.training.objectives.fill_in"], "drawn_spans", lambda ordinary, rng: [span]
    )
    whole = PackedBatch.from_sequences([model.tokenizer.encode(first + gap + last)])
    trained = fill_in(whole, model.vocabulary, torch.Generator())
    (start,) = starts_of(model, first, last, len(gap), 9)
    tokens, positions = start.read.tokens.tolist(), start.read.positions.tolist()
    assert trained.batch.tokens.tolist() == (tokens + ids(model, " ".join(gap)))[:-1]
    assert trained.batch.positions.tolist() == (positions + list(start.places))[:-1]
    assert trained.targets.tolist()[-len(gap) :] == ids(model, " ".join(gap))


def test_places_beyond_the_last_position():
    (start,) = starts_of(make(), "A" * 2045, "RT", 4, 9)
    assert list(start.places) == [2046, 2047, 2047, 2047]
    assert start.read.positions[2045:].tolist() == [2045, 2046, 2047, 2047, 0, 2046]
    tokens, positions = move_spans_behind(
        np.array(ids(make(), "<cls> L A G V")), [(2, 4)], make().vocabulary, positions=3
    )
    assert tokens.tolist() == ids(make(), "<cls> L <mask-1> V <eos> <mask-1> A G")
    assert positions.tolist() == [0, 1, 2, 2, 0, 2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "last", "gap"), [("LAG", "RT", 5), ("", "RTS", 2), ("LAG", "", 4)])
def test_fills_in_as_the_slow_way_does(kind, first, last, gap):
    model = make(kind)
    wanted = slowly(model, 6, first, last, gap, seed=3)
    assert len(set(wanted)) > 3
    assert generate(model, 6, prompts=first, suffixes=last or None, gaps=gap, seed=3, max_length=1) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_of_many_lengths_whatever_the_batch_size(kind):
    model = make(kind)
    prompts, suffixes, gaps = ["LAG", "", "T"], ["R", "SE", "R"], [1, 6, 3]
    wanted = generate(model, 2, prompts=prompts, suffixes=suffixes, gaps=gaps)
    rows = zip(prompts, suffixes, gaps, strict=True)
    assert wanted == [text for n, row in enumerate(rows) for text in slowly(model, 2, *row, start=2 * n)]
    for size in (1, 5):
        assert generate(model, 2, prompts=prompts, suffixes=suffixes, gaps=gaps, batch_size=size) == wanted
    one = [generate(model, prompts="LAG", suffixes="R", gaps=gap, temperature=0)[0] for gap in (6, 2)]
    assert one[1] != one[0][:4] + one[0][-1]  # the length of a gap is seen
    assert generate(model, prompts="LAG", suffixes="R", gaps=[6, 2], temperature=0) == one


@pytest.mark.parametrize("kind", KINDS)
def test_read_with_a_state_is_read_whole(kind):
    model = make(kind).double()
    (start,) = starts_of(model, "LAGV", "RTS", 3, 9)
    tokens = torch.tensor([*start.read.tokens.tolist(), *ids(model, "S E R")])
    positions = torch.tensor([*start.read.positions.tolist(), *start.places])

    def piece(begin, end):
        zeros = torch.zeros(end - begin, dtype=torch.int64)
        bounds = torch.tensor([0, end - begin])
        return PackedBatch(tokens[begin:end], bounds, positions[begin:end], block_positions=zeros)

    with torch.inference_mode():
        whole, _ = model.backbone(PackedBatch(tokens, torch.tensor([0, len(tokens)]), positions))
        read = len(start.read.tokens)
        hidden, state = model.backbone(piece(0, read), return_state=True)
        parts = [hidden]
        for at in range(read, len(tokens)):
            hidden, state = model.backbone(piece(at, at + 1), state, return_state=True, reuse_state=True)
            parts.append(hidden)
    assert (torch.cat(parts) - whole).abs().max() <= 1e-12


def test_stop_ends_a_gap_early():
    model = make()
    plain = generate(model, 20, prompts="LA", suffixes="G", gaps=8)
    assert all(len(text) == 11 for text in plain) and any("S" in text for text in plain)
    stopped = generate(model, 20, prompts="LA", suffixes="G", gaps=8, stop="S")
    assert stopped == ["LA" + text[2:-1].split("S")[0] + "G" for text in plain]


def test_without_positions_a_gap_needs_no_length():
    model = make(rotary=None)
    free = generate(model, 30, prompts="LA", suffixes="G", max_length=12)
    assert all(text.startswith("LA") and text.endswith("G") for text in free)
    assert len({len(text) for text in free}) > 3 and max(map(len, free)) <= 15  # <cls> ends them, or max_length
    given = generate(model, 8, prompts="LA", suffixes="G", gaps=4)
    assert given == slowly(model, 8, "LA", "G", 4) and {len(text) for text in given} == {7}


def test_what_is_refused():
    model = make()
    for kind in KINDS:
        with pytest.raises(ConfigError, match="say how many tokens are missing with gaps"):
            generate(make(kind), prompts="LA", suffixes="G")
    with pytest.raises(ConfigError, match="at least 1 token"):
        generate(model, prompts="LA", suffixes="G", gaps=[3, 0])
    with pytest.raises(ConfigError, match="2 prompts and 3 gaps"):
        generate(model, prompts=["L", "A"], suffixes="G", gaps=[1, 2, 3])
    with pytest.raises(InputError, match="suffix 2, position 1: 'J'"):
        generate(model, prompts="L", suffixes=["A", "J"], gaps=1)
    for absent in ("<mask-1>", "<eos>"):
        poor = make(tokenizer=make_tokenizer(without=[absent]))
        for options in ({"suffixes": "G"}, {"gaps": 2}):
            with pytest.raises(ConfigError, match=r"for a model that fills in: .*recipe prot-xlstm"):
                generate(poor, prompts="LA", **options)
    tokens = ["<pad>", "<mask>", "<gmask>", "<smask>", "<sop>", "<eop>", "<eos>", *LETTERS]
    tokenizer = LetterTokenizer(tokens, roles={"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}, after=["<eos>"])
    with pytest.raises(ConfigError, match="Leave gaps out"):
        generate(make("rotary", tokenizer=tokenizer, direction="prefix"), prompts="LA", suffixes="G", gaps=2)


@pytest.mark.slow
def test_a_trained_model_fills_in_from_both_sides(tmp_path, rng):
    """Four sequences begin alike: what is missing is told by what follows it."""
    tokenizer = make_tokenizer()
    begin = "LAGVSERT"
    ends = ["".join(rng.choice(list(LETTERS), 16)) for _ in range(4)]
    torch.manual_seed(0)
    model = LanguageModel(tokenizer, XLSTMConfig(len(tokenizer.vocabulary), 64, 2, heads=2, rotary="width"))
    settings = TrainingConfig(objective="fill-in", steps=400, batch_tokens=512, learning_rate=6e-3)
    train(model, [tokenizer.encode(begin + end) for end in ends] * 30, settings, out=tmp_path)
    found = generate(model, prompts=begin, suffixes=[end[2:] for end in ends], gaps=2, temperature=0)
    assert found == [begin + end for end in ends]
