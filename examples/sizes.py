"""The command `listen cost` as a script, see `listen/commands/cost.py`.

python examples/sizes.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("cost")
