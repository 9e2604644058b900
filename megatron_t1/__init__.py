"""T1 reasoning RL (arXiv 2501.11651) on Megatron-Core and vLLM. Read `Trainer.step` in rl.py; README.md has the map.

    rl sft pipeline curate convert logprobs grade       the jobs, one file each
    types fields config files metrics stop warn rank0   what all use
    cli check evaluation report synthesize              the command line, and what stands around the training
    servers rollout push                                vLLM: its processes, asking them, new weights into them
    data reward algo                                    tokens, verdicts, the loss
    models weights engine platform                      families, tensors, Megatron, CPU or CUDA

docs/design.md says how the house is cut and why. Imports go one way, and tests/test_imports.py holds them to it.
"""
