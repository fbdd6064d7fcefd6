"""The command line: options, errors as one line, exit codes.

In: arguments. Out: calls into the rooms. Start at `main.py`.
"""
