from conformance import programs_arguments, programs_callbacks, programs_calls  # noqa: F401
