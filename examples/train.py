"""The command `listen train` as a script, see `listen/commands/train.py`.

accelerate launch examples/train.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("train")
