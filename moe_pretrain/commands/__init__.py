"""One file for each command: ``arguments(parser)`` adds its options, ``run(options)`` returns its exit code."""
