"""The vLLM engine. The trainer holds the engine object; vLLM itself runs in a child process.

In the trainer's process:
- engine.py: `VllmEngine`, the `Engine` of a rank. Syncs weights, samples, replaces a child that failed.
- process.py: starts and watches the child; sends it requests and reads its replies over private sockets.
- client.py: one sampling request: groups as they finish, abort. settings.py: the child's environment, checks of settings, seeds.
- leftovers.py: the child's private temporary folder and shared memory, and their removal.
- shared_start.py, shared_engine.py, shared_server.py: one vLLM used by several ranks. Its first rank owns the `VllmEngine` and
  serves it (`SharedServer`); every rank, the first included, samples through a `SharedEngine`.
In vLLM's process:
- server.py: the loop that answers requests, around a `Backend`. worker.py: the program, and the backend that holds vLLM.
- shards.py: the program if vLLM is split over devices (tensor parallelism). vLLM then starts one more process per device, which
  runs shard_worker.py.
- orphan.py: ends the process when the trainer has ended.
- reload.py, direct_load.py: put new weights into the loaded model (direct_load.py is the fast way on a CPU) and prove that its
  kernels use them.
"""
