"""The command `listen compare` as a script, see `listen/commands/compare.py`.

python examples/compare.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("compare")
