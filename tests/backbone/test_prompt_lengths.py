"""How much of padded prompts a network is given."""

from __future__ import annotations

import torch

from backbone.families.components.prompt_lengths import BUCKET, PromptLengths, cut_padding, in_buckets


def mask_of(*lengths: int, padded: int = 3 * BUCKET) -> torch.Tensor:
    return (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def test_prompts_are_cut_at_the_longest_s_end_and_in_classes_at_a_multiple() -> None:
    text = {"hidden": torch.randn(2, 3 * BUCKET, 4), "mask": mask_of(5, 9)}
    for inside, length in ((False, 9), (True, BUCKET)):
        with in_buckets() if inside else torch.no_grad():
            hidden, mask = cut_padding(text)
            assert torch.equal(hidden, text["hidden"][:, :length])
            assert mask is not None and mask.sum(1).tolist() == [5, 9] and mask.shape == (2, length)
    assert cut_padding({"hidden": text["hidden"], "mask": mask_of(9, 9)})[1] is None


@torch.no_grad()
def test_in_classes_prompts_of_one_length_have_a_mask_but_in_a_training() -> None:
    lengths = PromptLengths.of(mask_of(9, 9))
    with in_buckets():
        assert lengths.count_tokens() == (BUCKET, True)
        assert PromptLengths.of(mask_of(BUCKET, BUCKET)).count_tokens() == (
            BUCKET,
            True,
        )  # as shorter ones have
        assert PromptLengths.of(mask_of(BUCKET + 1, 2)).count_tokens() == (2 * BUCKET, True)
        assert PromptLengths.of(mask_of(70, padded=70)).count_tokens() == (70, False)  # there is no padding
        with torch.enable_grad():
            assert lengths.count_tokens() == (9, False)
            assert PromptLengths.of(mask_of(9, 5)).count_tokens() == (BUCKET, True)
    assert PromptLengths.of(torch.ones(1, 7, device="meta")).count_tokens() == (7, False)
