"""The command `listen eval` as a script, see `listen/commands/evaluate.py`.

accelerate launch examples/evaluate_tasks.py ...
"""

from listen_command import run

if __name__ == "__main__":
    run("eval")
