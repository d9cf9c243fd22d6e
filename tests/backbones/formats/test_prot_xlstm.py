"""Prot-xLSTM, beside what its authors' own code gave (tests/backbones/golden)."""

import json
from dataclasses import replace

import pytest
import torch
from processive.backbones import XLSTMConfig, config_to_dict
from processive.backbones.formats.prot_xlstm import PROT_XLSTM, TOKENIZER
from processive.backbones.formats.table import shapes_of_theirs
from processive.bio import homolog_batch, homolog_context
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel, load
from processive.sequences import PackedBatch, tokenizer_from_dict


@pytest.fixture
def folder(golden, patterned, tmp_path):
    """A checkpoint as their code saves it."""

    def write(**change):
        recorded = golden("prot_xlstm")
        (tmp_path / "config.json").write_text(json.dumps({**recorded["config"], **change}))
        torch.save(patterned(recorded["shapes"]), tmp_path / "pytorch_model.bin")
        return tmp_path

    return write


def context_of(recorded, tokenizer):
    """Homologs with the recorded spans, half-open there and with the last residue here."""
    spans = {i: [(a, b - 1) for a, b in each] for i, each in enumerate(recorded["spans"])}
    return homolog_context(recorded["homologs"], tokenizer, spans=spans)


def test_homologs_have_the_recorded_tokens_and_positions(golden):
    recorded, tokenizer = golden("prot_xlstm"), tokenizer_from_dict(TOKENIZER)
    ids, positions = context_of(recorded, tokenizer)
    assert ids.tolist() == recorded["ids"]
    assert positions.tolist() == recorded["positions"]
    batch = homolog_batch([recorded["homologs"], recorded["homologs"][:1]], tokenizer)
    assert batch.tokens.tolist()[: len(recorded["plain_ids"])] == recorded["plain_ids"]
    first = recorded["plain_positions"].index(0, 1)
    assert batch.positions.tolist() == recorded["plain_positions"] + recorded["plain_positions"][:first]


@torch.no_grad()
def test_logits_are_the_recorded_ones_whole_packed_and_streamed(golden, folder):
    recorded, model = golden("prot_xlstm"), load(folder())
    ids, positions = context_of(recorded, model.tokenizer)
    want, at = torch.tensor(recorded["logits"]), recorded["at"]
    assert want.std() > 0.1
    whole = batch_at([ids], [positions])
    assert (model(whole)[0][at] - want).abs().max() <= 1e-4
    packed = batch_at([ids[:7], ids], [positions[:7], positions])
    assert (model(packed)[0][7:][at] - want).abs().max() <= 1e-4
    state, pieces = None, []
    for begin, end in [(0, 20), (20, 21), (21, len(ids))]:
        logits, state = model(batch_at([ids[begin:end]], [positions[begin:end]]), state, return_state=True)
        pieces.append(logits)
    assert (torch.cat(pieces)[at] - want).abs().max() <= 1e-4
    elsewhere = PackedBatch.from_sequences([ids])  # positions that do not start anew
    assert (model(elsewhere)[0][at] - want).abs().max() > 0.1


def batch_at(sequences, positions):
    batch = PackedBatch.from_sequences(sequences)
    return PackedBatch(batch.tokens, batch.cu_seqlens, torch.cat([torch.as_tensor(part) for part in positions]))


def test_written_back_it_is_the_same_checkpoint(folder, tmp_path, same, patterned, golden):
    model = load(folder())
    model.save(tmp_path / "out", format="prot-xlstm")
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    same(written, patterned(golden("prot_xlstm")["shapes"]))
    config, wanted = json.loads((tmp_path / "out" / "config.json").read_text()), golden("prot_xlstm")["config"]
    for key in set(config) - {"mlstm_block", "context_length"}:
        assert config[key] == wanted[key], key
    for key in set(config["mlstm_block"]["mlstm"]) - {"chunk_size"}:
        assert config["mlstm_block"]["mlstm"][key] == wanted["mlstm_block"]["mlstm"][key], key
    same(dict(load(tmp_path / "out").state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("positions", ["abs_1d", "abs_2d", "rot", "rot_2d"])
def test_other_positions_are_refused_by_name(positions, folder):
    with pytest.raises(InputError, match=f"position_embeddings is '{positions}'"):
        load(folder(position_embeddings=positions))


def test_spans_that_cannot_be_filled_in_are_refused():
    tokenizer = tokenizer_from_dict(TOKENIZER)
    for spans in [[(0, 1)], [(2, 1)], [(1, 2), (2, 3)], [(3, 5)], [(1, 1), (2, 2), (3, 3), (4, 4)] * 2]:
        with pytest.raises(InputError) as error:
            homolog_context(["AAA", "AAAA"], tokenizer, spans={1: spans})
        assert error.value.record == 2
    with pytest.raises(InputError) as error:
        homolog_context(["AAA", "A-J"], tokenizer)
    assert (error.value.record, error.value.position) == (2, 2)
    tokens, positions = homolog_context(["A" * 9], tokenizer, positions=4)
    assert positions.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3] and len(tokens) == 10
    assert len(homolog_context([], tokenizer)[0]) == len(homolog_batch([], tokenizer)) == 0


@pytest.mark.parametrize(("width", "size"), [(1024, 102_167_680), (512, 25_918_080)])
def test_published_sizes(width, size):
    config = XLSTMConfig(38, width, 16, heads=4, rotary="width", norm_offset=True)
    with torch.device("meta"):
        model = LanguageModel(tokenizer_from_dict(TOKENIZER), config)
    theirs = shapes_of_theirs(PROT_XLSTM.table({"backbone": config_to_dict(config), "head": {}}), model.state_dict())
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == size


@pytest.mark.parametrize(
    "change",
    [{"blocks": ("mlstm", "slstm")}, {"rotary": "head"}, {"direction": "tied"}, {"expansion": (2.0, 4.0)}],
    ids=str,
)
def test_what_their_code_has_not_is_not_written(change, folder, tmp_path):
    model = load(folder())
    with pytest.raises(ConfigError):
        LanguageModel(model.tokenizer, replace(model.backbone.config, **change)).save(
            tmp_path / "o", format="prot-xlstm"
        )
