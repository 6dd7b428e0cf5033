"""The demo as a job: scikit-learn's digits, under three minutes on two cores.

python jobs/digits.py
fppmo-ray submit jobs/digits.py --run-dir /absolute/path --address http://HEAD:8265
"""

from fppmo_ray.demo import demo
from fppmo_ray.job import run_job

if __name__ == "__main__":
    run_job(demo)
