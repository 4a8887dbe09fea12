"""[V] eq. 9-16 and 23-29 written out in float64 over whole [N, V] tables: steps of DistRL + IPVRM on given rollouts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prmfast.distrl.rollouts import Rollouts


def transcribed(
    batches: Sequence[Rollouts],
    logits: Callable[[Any, Rollouts], Tensor],
    policy: Any,
    *,
    fixed_reference: bool,
    updates: int = 2,
    temperature: float = 1.0,
    p_min: float = 0.1,
    rates: tuple[float, float] = (1e-3, 1e-3),
    clip: tuple[float, float] = (0.2, 0.28),
) -> list[dict[str, Any]]:
    """For each batch the losses and gradient norms of its policy updates, rm_loss and sigma_v; trains ``policy``.

    rates: of the policy and of the reward model. clip: low and high, of both parts.
    logits(model, rollouts): float64 [N, V] of the answers' tokens, not divided by the temperature.
    """
    start, phi = copy.deepcopy(policy), copy.deepcopy(policy)
    inside = (1 - clip[0], 1 + clip[1])
    policy_adam = torch.optim.AdamW(policy.parameters(), lr=rates[0], weight_decay=0.0)
    phi_adam = torch.optim.AdamW(phi.parameters(), lr=rates[1], weight_decay=0.0)
    records = []
    for batch in batches:
        token, counts = batch.token_ids, [len(answer) for answer in batch.answers]
        row, y = torch.arange(len(token)), batch.outcome.double()
        old = (logits(policy, batch) / temperature).log_softmax(-1).detach()
        base = logits(start, batch).log_softmax(-1).detach() if fixed_reference else old
        ratio = (logits(phi, batch).log_softmax(-1) - base)[row, token]
        per_answer = []
        for s, part in enumerate(ratio.split(counts)):
            mu = y[batch.group == batch.group[s]].mean()
            shift = torch.logit(mu.clamp(1e-6, 1 - 1e-6))
            v = 10 * part.cumsum(0) / torch.arange(1, len(part) + 1)
            good = (1 - mu) * -torch.nn.functional.logsigmoid(v - (5 - shift))
            bad = mu * -torch.nn.functional.logsigmoid(-(v + 5 + shift))
            per_answer.append((good if y[s] else bad).mean())
        phi_adam.zero_grad()
        rm_loss = torch.stack(per_answer).mean()
        rm_loss.backward()
        torch.nn.utils.clip_grad_norm_(phi.parameters(), 1.0)
        phi_adam.step()

        with torch.no_grad():
            table = 10 * (logits(phi, batch).log_softmax(-1) - base)
        td = table[row, token]
        sigma = torch.cat([part.cumsum(0) for part in td.split(counts)]).std(correction=0) + 1e-8
        normed, outcome = torch.empty_like(td), torch.empty_like(y)
        owner = batch.group.repeat_interleave(torch.tensor(counts))
        for g in batch.group.unique():
            mine = td[owner == g] / sigma
            normed[owner == g] = (mine - mine.mean()) / (mine.std(correction=0) + 1e-8)
            r = y[batch.group == g]
            outcome[batch.group == g] = (r - r.mean()) / r.std(correction=0).clamp(min=1e-6)
        gae = torch.cat([part.flip(0).cumsum(0).flip(0) for part in normed.split(counts)])
        advantage = outcome.repeat_interleave(torch.tensor(counts)) + gae
        likely = old >= math.log(p_min)
        losses, norms = [], []
        for _ in range(updates):
            logp = (logits(policy, batch) / temperature).log_softmax(-1)
            rho = (logp - old)[row, token].exp()
            tok = torch.minimum(rho * advantage, rho.clamp(*inside) * advantage)
            ratios, a = (logp - old)[likely].exp(), table[likely] / sigma
            entry = old[likely].exp() * torch.minimum(ratios * a, ratios.clamp(*inside) * a)
            dist = torch.zeros_like(tok).index_add(0, likely.nonzero()[:, 0], entry)
            loss = -torch.stack([part.mean() for part in (tok + 0.1 * dist).split(counts)]).mean()
            policy_adam.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
            losses.append(loss.item())
            policy_adam.step()
        records.append({"losses": losses, "norms": norms, "rm_loss": rm_loss.item(), "sigma_v": float(sigma - 1e-8)})
    return records
