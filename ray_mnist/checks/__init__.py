"""What `python -m ray_mnist.doctor` checks. Each check is what it is about, and its findings, sentences with a mend."""

Check = tuple[str, list[str]]
