"""Room candidate_td against the recorded values of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.device import backends, candidate_td, token_logprob
from tests.ops.test_candidate_td import interpreted, row_of
from tests.vectors import Vectors, assert_relative

each_backend = pytest.mark.parametrize("backend", backends("candidate_td"))


@each_backend
def test_released_candidates(backend: str, shared_vectors: Path) -> None:
    """The released set is p > p_min strictly within the top k, the sampled token in slot 0; values within it."""
    vectors = Vectors(shared_vectors / "distrl_candidates.npz")
    for case in vectors.cases:
        x, y, options = vectors.inputs(case), vectors.outputs(case), case["params"]
        columns = x["old_logits"].shape[-1]
        rows = slice(24 if interpreted(backend) else None)
        flat = {name: x[name].reshape(-1, columns)[rows] for name in ("old_logits", "rm_logits")}
        every, sampled = x["tokens"].numel(), x["tokens"].reshape(-1)[rows]
        p_min = options["min_probability"]
        found = candidate_td(
            flat["old_logits"], flat["rm_logits"], p_min=p_min, beta=options["beta"], sampled=sampled, backend=backend
        )
        row, size = row_of(found), "f64" if flat["old_logits"].dtype == torch.float64 else "f32"
        indices, logp, td = (
            y[name].reshape(every, -1)[rows] for name in ("indices", f"old_logp_{size}", f"candidate_td_{size}")
        )
        assert torch.equal(indices[:, 0], sampled)
        strict = logp.exp() > p_min
        strict[:, 0] = True
        live = (
            (y[f"candidate_td_{size}"] != 0).any(-1).reshape(-1)[rows]
        )  # released code zeroes the last token and the padding
        compared = 0
        for t in range(len(sampled)):
            mine = found.token_ids[row == t]
            theirs = indices[t][strict[t]]
            if indices.shape[1] >= 5:  # k = 5 holds every p > 0.1 but for the one the forced token pushed out
                assert set(theirs.tolist()) == set(mine.tolist())
            assert set(theirs.tolist()) <= set(mine.tolist())
            if not live[t]:
                continue
            for slot in strict[t].nonzero()[:, 0].tolist():
                at = (row == t) & (found.token_ids == indices[t, slot])
                torch.testing.assert_close(
                    found.policy_logp[at][0], logp[t, slot].to(found.policy_logp.dtype), rtol=1e-5, atol=2e-6
                )
                torch.testing.assert_close(
                    found.advantage[at][0], td[t, slot].to(found.advantage.dtype), rtol=1e-5, atol=4e-5
                )
                compared += 1
        assert compared > 0 or case["case"].startswith("1x1x7")


@each_backend
def test_released_log_ratio(backend: str, shared_vectors: Path) -> None:
    vectors = Vectors(shared_vectors / "ipvrm_logratio.npz")
    for case in vectors.cases:
        x, y = vectors.inputs(case), vectors.outputs(case)
        rows = slice(24 if interpreted(backend) else None)
        columns, labels = x["policy_logits"].shape[-1], x["labels"].reshape(-1)[rows]
        for dtype in (torch.float64, torch.float32):
            policy = x["policy_logits"].reshape(-1, columns)[rows].to(dtype).requires_grad_()
            reference_logits = x["ref_logits"].reshape(-1, columns)[rows].to(dtype)
            ratio = token_logprob(policy, labels, backend=backend) - token_logprob(
                reference_logits, labels, backend=backend
            )
            # the file's float64 values belong to inputs that it stores in float32
            assert_relative(ratio.detach().double(), y["logratio_f64_of_f64_inputs"].reshape(-1)[rows], 1e-5)
            assert_relative(ratio.detach().double(), y["logratio_f32"].reshape(-1)[rows].double(), 1e-5)
            (grad,) = torch.autograd.grad((x["w"].reshape(-1)[rows].to(dtype) * ratio).sum(), policy)
            assert_relative(
                grad, y["grad_f32"].reshape(-1, columns)[rows].to(dtype), 1e-4 if dtype == torch.float64 else 1e-5
            )
