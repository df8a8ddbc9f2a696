"""The command `listen train-classifier` as a script, see `listen/commands/train_classifier.py`.

accelerate launch examples/train_classifier.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("train-classifier")
