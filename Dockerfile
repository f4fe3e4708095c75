# Fluffle with its example learners: `docker run IMAGE --help`, or the whole federation with docker-compose.yml.
FROM python:3.11-slim

# More words for pip. PyTorch's ordinary wheels carry CUDA and several gigabytes; where no GPU is used, name the index
# of its CPU builds: docker compose build --build-arg PIP_ARGS="--extra-index-url URL"
ARG PIP_ARGS=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

RUN groupadd --gid 10001 fluffle \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home fluffle \
 && install -d -o fluffle -g fluffle /runs \
 && install -d -o fluffle -g fluffle -m 750 /federation /federation/broker /invitation \
 && for each in coordinator worker-1 worker-2 worker-3 worker-4 held-out; do \
      install -d -o fluffle -g fluffle -m 700 "/invitations/$each"; done
# Volumes that are mounted there belong to this user, because these folders do.

# The dependencies are a layer of their own: a change of the code does not install PyTorch again.
WORKDIR /tmp/build
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['demo'], sep='\n')" > wanted.txt \
 && pip install ${PIP_ARGS} -c constraints.txt -r wanted.txt

RUN --mount=type=bind,target=/tmp/source,rw pip install ${PIP_ARGS} --no-deps /tmp/source

# Never root. A learner of one's own is mounted here and called by its file's name.
WORKDIR /learners
USER fluffle
ENTRYPOINT ["fluffle"]
