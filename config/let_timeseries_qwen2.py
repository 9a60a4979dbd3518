# Late-to-Early Training (Zhao et al.), Appendix E and Table 2: Qwen2-0.5B fine-tuned on ten data
# sets of time series, without a teacher and with its sixth layer aligned with a teacher's last.
# Learning rates and epochs are our choice, as the paper gives none. Needs requirements-extras.txt.
method = 'timeseries'
datasets = ('EthanolConcentration', 'FaceDetection', 'Handwriting', 'Heartbeat', 'JapaneseVowels')
datasets += ('PEMS-SF', 'SelfRegulationSCP1', 'SelfRegulationSCP2', 'SpokenArabicDigits')
datasets += ('UWaveGestureLibrary',)
base = 'Qwen/Qwen2-0.5B'
size = 'qwen2-0.5b'
teacher_size = '64x4'
teacher_learning_rate = 1e-3
pairing = 'L1F6'
epochs = 30
teacher_epochs = 120
lambda0 = 0.1
s_stop = 0.5
seeds = 1

batch_size = 16
learning_rate = 5e-5
schedule = 'cosine'
warmup = 0.1
