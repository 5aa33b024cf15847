"""Tokens/s of generation beside `transformers`, the same GPT-2 weights in both, greedy.

    python -m benchmarks.generate [--rounds 3] [--new 32] [--prompt 64] [--threads 1] [--batches 1,16]
                                  [--precision bf16]

In one process, in turn: ours, theirs, ours, theirs. In fp32 both write the same tokens, which is checked. The weights
are random, of GPT-2's size (124 M); prompts too. A round times the whole call, the reading of the prompts included.
Seconds of a processor are those of the process: beside other work they say more than those of the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.rounds import median_range
from cairn.ops.precision import DTYPES


def pair(
    prompt: int, new: int, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], list[list[int]]], Callable[[torch.Tensor], list[list[int]]]]:
    """Two functions that go on from prompts (B, T), ours and theirs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from cairn.config.model import GPTSection
    from cairn.decode.generate import generate
    from cairn.decode.sample import Sampling
    from cairn.hub import gpt2
    from cairn.hub.convert import to_hub
    from cairn.models.gpt import GPT

    torch.manual_seed(0)
    model = GPT(GPTSection(init_std=0.1), 50257).eval()
    theirs = GPT2LMHeadModel(GPT2Config(**gpt2.to_config(model.section, 50257))).eval()
    theirs.generation_config.eos_token_id = None  # both write all the tokens asked for
    theirs.load_state_dict(to_hub(dict(model.named_parameters()), gpt2.table(model.section)), strict=False)
    model.to(dtype)
    theirs.to(dtype)  # type: ignore[arg-type]

    def ours_of(prompts: torch.Tensor) -> list[list[int]]:
        return generate(model, prompts.tolist(), new, Sampling(temperature=0))

    def theirs_of(prompts: torch.Tensor) -> list[list[int]]:
        mask = torch.ones_like(prompts)
        keys = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        written: torch.Tensor = theirs.generate(prompts, max_new_tokens=new, **keys)  # type: ignore[operator]
        return written[:, prompt:].tolist()  # type: ignore[no-any-return]

    return ours_of, theirs_of


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    systems = dict(zip(("cairn", "transformers"), pair(args.prompt, args.new, DTYPES[args.precision]), strict=True))
    print("| batch | system | tokens/s, median (range) | tokens per second of a processor | against cairn |")
    print("| ---: | --- | --- | --- | ---: |")
    for batch in map(int, args.batches.split(",")):
        prompts = torch.randint(50257, (batch, args.prompt), generator=torch.Generator().manual_seed(batch))
        clocks = (time.perf_counter, time.process_time)
        speeds: dict[str, list[list[float]]] = {name: [] for name in systems}
        for number in range(args.rounds + 1):
            written = {}
            for name, run in systems.items():
                start = [clock() for clock in clocks]
                written[name] = run(prompts)
                if number:  # the first round warms up
                    took = [clock() - begun for clock, begun in zip(clocks, start, strict=True)]
                    speeds[name].append([batch * args.new / seconds for seconds in took])
            same = written["cairn"] == written["transformers"]
            assert same or args.precision != "fp32", "the two wrote different tokens"
        ours = statistics.median(processor for _, processor in speeds["cairn"])
        for name, found in speeds.items():
            columns = [median_range(column, ".1f") for column in zip(*found, strict=True)]
            ratio = ours / statistics.median(processor for _, processor in found)
            print(f"| {batch} | {name} | {columns[0]} | {columns[1]} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
