"""`python -m listen` is the command `listen`."""

from listen_command import main

if __name__ == "__main__":
    main()
