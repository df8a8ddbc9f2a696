"""The command `listen ask` as a script, see `listen/commands/ask.py`.

python examples/ask.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("ask")
