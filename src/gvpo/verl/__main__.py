"""`python -m gvpo.verl <any ppo_trainer Hydra overrides>`."""

from gvpo.verl.main import main

if __name__ == "__main__":
    main()
