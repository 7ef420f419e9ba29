"""An OpenEnv server as the environment of GVPO's episodes: the model guesses a number, told higher or lower.

    pip install "gvpo[trl]" openenv-core
    python examples/openenv_guess.py --model Qwen/Qwen3-0.6B

The server here is a small one of our own, in a process of its own; put `--url` for another, and its tools in
place of `guess`. Each episode has a session of its own. The secret comes from the row, so that the episodes
of a group play the same game (docs/guide/agents.md, "Chance").
"""

import argparse
import multiprocessing
import time

import requests
import uvicorn
from datasets import Dataset
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv.core.generic_client import GenericEnvClient

from gvpo.trl import GVPOConfig, GVPOTrainer

URL = "http://127.0.0.1:8765"
GUESSES = 4  # enough for the half of 15, and the half of that, …


# ------------------------------------------------------------------------------------------- the server


class Guess(Action):
    number: int


class Answer(Observation):
    text: str


class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **_):
        self.secret, self.left = 1 + (seed or 0) % 15, GUESSES
        return Answer(text=f"Guess a number from 1 to 15 in {GUESSES} guesses.")

    def step(self, action, timeout_s=None, **_):
        self.left -= 1
        if action.number == self.secret:
            return Answer(text="Right.", reward=1.0, done=True)
        text = "Higher." if action.number < self.secret else "Lower."
        return Answer(text=text, reward=0.0, done=self.left == 0)

    @property
    def state(self):
        return State()


def serve():
    app = create_fastapi_app(Game, Guess, Answer, max_concurrent_envs=1024)
    uvicorn.run(app, port=int(URL.rpartition(":")[2]), log_level="error")


# ---------------------------------------------------------------------------------------- the environment


class Session:
    """By TRL's protocol: `reset` gives the first observation, `get_reward` the reward, the rest are tools."""

    url = URL

    def __init__(self):
        self.client = GenericEnvClient(base_url=self.url).sync()
        self.client.connect()

    def reset(self, seed, **row):
        self.reward, self.done = 0.0, False
        return self.client.reset(seed=seed).observation["text"]

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 15.
        """
        if self.done:
            raise ValueError("The game is over.")
        result = self.client.step({"number": number})
        self.reward, self.done = self.reward + result.reward, result.done
        return result.observation["text"]

    def get_reward(self) -> float:
        return self.reward


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--url", help="of a server that runs; by default one is started")
    parser.add_argument("--output", default="runs/guess")
    arguments = parser.parse_args()
    if arguments.url:
        Session.url = arguments.url
    else:
        multiprocessing.Process(target=serve, daemon=True).start()
        wait_for(URL)
    empty = [[{"role": "user", "content": ""}]] * 960
    trainer = GVPOTrainer(
        arguments.model,
        args=GVPOConfig(
            arguments.output, beta=0.1, reference="initial", num_generations=8, max_completion_length=512,
            learning_rate=1e-6, tool_timeout=10.0,
        ),
        train_dataset=Dataset.from_dict({"prompt": empty, "seed": list(range(960))}),
        environment_factory=Session,
    )  # fmt: skip
    trainer.train()


def wait_for(url: str) -> None:
    for _ in range(100):
        try:
            requests.get(f"{url}/health", timeout=1)
        except requests.ConnectionError:
            time.sleep(0.3)
        else:
            return
    raise SystemExit(f"No server answers at {url}.")


if __name__ == "__main__":
    main()
