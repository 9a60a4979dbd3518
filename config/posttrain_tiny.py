# Post-training of the family of progressive_tiny (Progressive training, Appendix E, at a
# hundred-thousandth of the scale): fine-tuning on documenting functions, given their signatures,
# then DPO with the function's own documentation preferred to another's.
#   python train.py config/progressive_tiny.py      # first
method = 'posttrain'
models = tuple(f'out/progressive_tiny/{size}' for size in ('32x2', '48x2', '64x2', '64x4'))
data = 'signatures'
preferences = 'preferences'

block_size = 128
batch_size = 16
sft_epochs = 0.25
sft_learning_rate = 1e-3
dpo_epochs = 0.1
dpo_learning_rate = 1e-4  # larger than the paper's, as tiny models need
warmup = 0.1
