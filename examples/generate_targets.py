"""The command `listen targets` as a script, see `listen/commands/targets.py`.

accelerate launch examples/generate_targets.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("targets")
