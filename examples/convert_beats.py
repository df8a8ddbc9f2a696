"""The command `listen convert-beats` as a script, see `listen/commands/convert_beats.py`.

python examples/convert_beats.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("convert-beats")
