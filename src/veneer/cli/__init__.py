"""The command line: one file per verb, and nothing that a Python caller could not do."""
