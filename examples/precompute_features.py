"""The command `listen precompute` as a script, see `listen/commands/precompute.py`.

accelerate launch examples/precompute_features.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("precompute")
