"""Ours against peers, in one run: see scripts/benchmark."""

import sys

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tune"]:
            from benchmark_tune import tune

            tune()
        case ["train", *arguments]:
            from benchmark_train import train

            train(arguments)
        case ["scale", *arguments]:
            from benchmark_scale import scale

            scale(arguments)
        case ["gpu", *arguments]:
            from benchmark_gpu import gpu

            gpu(arguments)
        case _:
            sys.exit("usage: scripts/benchmark tune | train [--quick] | scale [--quick] | gpu [--quick]")
