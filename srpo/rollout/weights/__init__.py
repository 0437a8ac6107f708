"""Transport of weights from the trainer to vLLM's process, bucket by bucket, without files.

- buckets.py: packs tensors into buckets; computes bit sums, which show whether all weights arrived.
- shared_memory.py (CPU): the trainer writes each bucket to shared memory; vLLM's process maps the same pages.
- cuda_ipc.py (GPU): the trainer packs each bucket into a staging buffer; vLLM's process opens its CUDA IPC handle.

All three run in the trainer's process; vLLM's process also uses buckets.py, and `map_segment` of shared_memory.py. A sync begins,
sends all buckets and finishes; vLLM's process then returns the bit sums of the weights that its kernels use
(`srpo.rollout.vllm.reload`), and these must equal the trainer's.
"""
