"""What every embedding promises, run over all of them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.embeddings import EMBEDDINGS, forward_passes
from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.model.flops import ModelShape
from tiny_models import DECODERS, one_row, padded_by, permuted, random_batch, tiny_model

# Every embedding that a model computes, in forms that work on models of three blocks and really project.
CASES = {
    "error-outer": [{"side": 4}, {"depth": 0, "side": 4}, {"depth": 1}],
    "error": [{}, {"depth": 0}],
    "hidden-error": [{}, {"depth": 2}],
    "hidden-mean": [{}, {"depth": 1}],
    "rds": [{}, {"positions": "supervised"}],
    "jvp": [{"depth": 2}, {"depth": 1, "directions": 3, "positions": "last", "combine": "concat"}],
    "lens-gradient": [{"depth": 2, "side": 4}],
    "tail-gradient": [{"blocks": 1, "side": 4}],
    "gradient": [{"side": 4}],
}
ALL = [(name, fields) for name, forms in CASES.items() for fields in forms]
SIZES = {"rows": 4.0, "tokens": 400.0, "supervised_tokens": 200.0, "sum_sq_len": 40_000.0}

# float32 results of float64 models, parts of which compute in float32 whatever the dtype.
TOLERANCE = 2e-6

MODEL = tiny_model("llama", blocks=3)


def make(name, fields, **more):
    return EMBEDDINGS[name](**fields, **more)


def test_every_embedding_is_in_the_table_under_its_own_name():
    assert set(EMBEDDINGS) == {*CASES, "tfidf", "given"}
    assert all(EMBEDDINGS[name].name == name for name in EMBEDDINGS)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("name", "fields"), ALL)
def test_rows_are_of_unit_length_in_every_family(name, fields, family):
    found = make(name, fields).start(tiny_model(family, blocks=3, dtype=torch.float32))(random_batch([5, 9, 3]))
    assert set(found) == {"embedding", "norm"}
    assert found["embedding"].dtype == found["norm"].dtype == torch.float32
    assert found["embedding"].shape[0] == 3 and found["embedding"].dim() == 2
    torch.testing.assert_close(found["embedding"].norm(dim=1), torch.ones(3))
    assert bool((found["norm"] > 0).all())
    assert not found["embedding"].requires_grad


@settings(max_examples=6)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 4), st.randoms())
@pytest.mark.parametrize(("name", "fields"), ALL)
def test_padding_batch_mates_and_order_have_no_effect(name, fields, lengths, extra, random):
    embed = make(name, fields).start(MODEL)
    batch = random_batch(lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    whole = embed(batch)["embedding"]
    other = embed(padded_by(permuted(batch, order), extra))["embedding"]
    torch.testing.assert_close(other, whole[order], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(embed(one_row(batch, 0))["embedding"], whole[:1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "fields"), ALL)
def test_model_is_left_as_it_was_and_dropout_is_off(name, fields):
    model = tiny_model("gpt2", blocks=3, dropout=0.5, dtype=torch.float32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = random_batch([5, 4])
    embed = make(name, fields).start(model)
    assert torch.equal(embed(batch)["embedding"], embed(batch)["embedding"])
    assert model.training and all(module.training for module in model.modules())
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "fields"), ALL)
def test_adapters_checkpointing_and_half_precision_are_no_obstacle(name, fields):
    batch = random_batch([5, 4])
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", blocks=3, lora=True, dtype=dtype)
        plain = make(name, fields).start(model)(batch)["embedding"]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = make(name, fields).start(model)(batch)["embedding"]
        assert plain.dtype == torch.float32 and bool(torch.isfinite(plain).all())
        torch.testing.assert_close(again, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "fields"), ALL)
def test_identity_is_json_and_knows_every_setting(name, fields):
    embedding = make(name, fields)
    assert json.loads(json.dumps(embedding.identity)) == embedding.identity
    others = [EMBEDDINGS[other](**f).identity for other, f in ALL]
    assert others.count(embedding.identity) == 1
    if hasattr(embedding, "seed"):
        assert make(name, fields, seed=1).identity != embedding.identity


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, f in ALL if "side" in f or n == "jvp"])
def test_seed_decides_random_parts(name, fields):
    batch = random_batch([5, 4])
    zero, same, other = (make(name, fields, seed=seed).start(MODEL)(batch)["embedding"] for seed in (0, 0, 1))
    assert torch.equal(zero, same) and not torch.allclose(zero, other, atol=0.01)


@pytest.mark.parametrize(("name", "fields"), ALL)
def test_rows_with_broken_weights_are_named(name, fields):
    model = tiny_model("llama", blocks=3, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    batch = random_batch([5, 4, 3], vocab=50)
    batch.input_ids[1, 0] = 60
    embed = make(name, fields).start(model)
    with pytest.raises(NonFinite, match=r"rows 1 (is|are) NaN or infinite") as error:
        embed(batch)
    assert error.value.rows == (1,)


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, f in ALL if "last" not in f.values() and n != "rds"])
def test_rows_without_a_label_are_named(name, fields):
    batch = random_batch([5, 4])
    batch.supervised[1] = False
    with pytest.raises(InvalidInput, match="rows 1 have no supervised token"):
        make(name, fields).start(MODEL)(batch)


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, f in ALL if f.get("depth") or "blocks" in f])
def test_more_blocks_than_the_model_has_are_refused(name, fields):
    which = "blocks" if "blocks" in fields else "depth"
    with pytest.raises(InvalidSettings, match="9 blocks were asked for; expected"):
        make(name, {**fields, which: 9}).start(MODEL)


@pytest.mark.parametrize(("name", "fields"), ALL)
def test_cost_in_forward_passes_does_not_depend_on_how_many_rows_there_are(name, fields):
    shape = ModelShape.from_model(MODEL)
    one = forward_passes(make(name, fields), shape, **SIZES)
    ten = forward_passes(make(name, fields), shape, **{key: 10 * size for key, size in SIZES.items()})
    assert one == pytest.approx(ten, rel=1e-9) and one > 0
