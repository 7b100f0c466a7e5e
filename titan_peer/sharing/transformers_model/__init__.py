"""The model for users of transformers: `titan-peer export` copies these files beside the weights.

They import nothing of titan_peer, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works
where only torch and transformers are installed.
"""
