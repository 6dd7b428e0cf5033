"""The demo as a job: scikit-learn's digits, under three minutes on two cores.

python jobs/digits.py
ray job submit --working-dir . -- python jobs/digits.py --run-dir /absolute/path
"""

from fppmo_ray.cli import run_job
from fppmo_ray.demo import demo

if __name__ == "__main__":
    run_job(demo)
