"""The command `listen convert-salmonn` as a script, see `listen/commands/convert_salmonn.py`.

python examples/convert_salmonn.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("convert-salmonn")
