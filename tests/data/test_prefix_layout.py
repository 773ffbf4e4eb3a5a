"""Positions and context of GLM prompts are those of the published code."""

import json

import numpy as np
import pytest

from jaxllm.data.prefix_layout import PrefixIds, derive_layout
from jaxllm.errors import InputError
from tests.conftest import GOLDENS

FAMILIES = ("glm-10b", "glm-130b", "chatglm-6b")
FOLDERS = [folder for name in FAMILIES for folder in sorted((GOLDENS / "models_glm").glob(f"{name}-*"))]
IDS = PrefixIds(mask=90, gmask=91, smask=92, sop=93, eop=94)


def special_ids(folder):
    config, meta = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "meta"))
    if given := meta.get("special_ids"):
        given = {name.lower(): value for name, value in given.items()}
        return PrefixIds(**{name: given[name] for name in ("mask", "gmask", "smask", "sop", "eop")})
    return PrefixIds(
        mask=config["mask_token_id"],
        gmask=config["gmask_token_id"],
        smask=None,
        sop=config["bos_token_id"],
        eop=config["eos_token_id"],
    )


def options_of(folder):
    rule = "gmask_first" if folder.name.startswith("chatglm-6b") else "only"
    return {"block_positions": not folder.name.startswith("glm-130b"), "mask_rule": rule}


def allowed(layout, valid):
    length = valid.shape[1]
    seen = layout.prefix_mask[:, None, :] | np.tri(length, dtype=bool)
    return seen & valid[:, None, :] & valid[:, :, None]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_row_with_one_mask_token_is_laid_out_as_published(folder):
    ids = special_ids(folder)
    with np.load(folder / "golden.npz") as golden:
        arrays = {name: golden[name] for name in golden.files}
    tokens, valid = arrays["input_ids"], arrays["valid"]
    single = np.isin(tokens, ids.masks).sum(axis=1) == 1
    assert single.any()
    layout = derive_layout(tokens[single], valid[single], ids, **options_of(folder))
    assert (layout.positions == arrays["position_ids"][single]).all()
    if "block_position_ids" in arrays:
        assert (layout.block_positions == arrays["block_position_ids"][single]).all()
    else:
        assert layout.block_positions is None
    assert (allowed(layout, valid[single]) == (arrays["allowed"] & valid[:, :, None])[single]).all()
    for row in np.flatnonzero(~single):
        with pytest.raises(InputError, match=r"row 0 has several mask tokens.*positions, block_positions and mask"):
            derive_layout(tokens[[row]], valid[[row]], ids, block_positions=True)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_slots_to_be_generated_go_on_as_the_tokens_before_them(folder):
    ids, options = special_ids(folder), options_of(folder)
    with np.load(folder / "golden.npz") as golden:
        tokens, valid = golden["input_ids"], golden["valid"]
    row = int(np.flatnonzero(np.isin(tokens, ids.masks).sum(axis=1) == 1)[0])
    tokens, valid = tokens[[row]][:, valid[row]], np.ones((1, valid[row].sum()), bool)
    whole = derive_layout(tokens, valid, ids, **options)
    begin = int((tokens[0] == ids.sop).argmax()) + 1
    begun = derive_layout(tokens[:, :begin], valid[:, :begin], ids, num_slots=tokens.shape[1], **options)
    for found, expected in zip(begun, whole, strict=True):
        assert (found is expected is None) or (found == expected).all()


def test_padding_changes_nothing_on_either_side():
    prompt = [5, 91, 7, 93, 8]
    plain = derive_layout(np.array([prompt]), np.ones((1, 5), bool), IDS, block_positions=True, num_slots=7)
    left = np.array([[0, 0, *prompt]])
    right = np.array([[*prompt, 0, 0]])
    from_left = derive_layout(left, left > 0, IDS, block_positions=True, num_slots=9)
    from_right = derive_layout(right, right > 0, IDS, block_positions=True, num_slots=9)
    for name in plain._fields:
        expected = getattr(plain, name)[0].tolist()
        assert getattr(from_left, name)[0].tolist() == [0, 0, *expected]
        assert getattr(from_right, name)[0].tolist() == [*expected[:5], 0, 0, *expected[5:]]
    assert plain.positions[0].tolist() == [0, 1, 2, 1, 1, 1, 1]
    assert plain.block_positions[0].tolist() == [0, 0, 0, 1, 2, 3, 4]


def test_which_mask_token_is_filled():
    both = np.array([[5, 90, 91, 93, 6]])
    layout = derive_layout(both, both > 0, IDS, block_positions=True, mask_rule="gmask_first")
    assert layout.positions[0].tolist() == [0, 1, 2, 2, 2]
    # A mask token among what was generated is none to be filled.
    later = np.array([[5, 90, 6, 93, 91]])
    for rule in ("only", "gmask_first"):
        layout = derive_layout(later, later > 0, IDS, block_positions=False, mask_rule=rule)
        assert layout.positions[0].tolist() == [0, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "rule", "problem"),
    [
        ([[5, 91, 93], [5, 91, 6]], "only", r"row 1 has no <sop> \(id 93\)"),
        ([[5, 91, 93], [5, 6, 93]], "only", r"row 1 has no mask token \(ids 90, 91, 92\) before <sop>"),
        ([[5, 92, 93]], "gmask_first", r"row 0 has no mask token"),
        ([[90, 91, 93]], "only", r"row 0 has several mask tokens"),
    ],
)
def test_prompts_that_say_too_little_or_too_much_are_refused(tokens, rule, problem):
    tokens = np.array(tokens)
    with pytest.raises(InputError, match=f"input_ids: {problem}"):
        derive_layout(tokens, tokens > 0, IDS, block_positions=True, mask_rule=rule)
