"""The command `listen check-data` as a script, see `listen/commands/check_data.py`.

python examples/check_data.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("check-data")
