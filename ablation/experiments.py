"""The ablations as data: what is varied, and what the paper reports.

    python ablate.py list

`variants` are settings over the recipe of the scale; the one without any is the
baseline (78.52 in the paper). HALF stands for half of the recipe's value. `paper` is
the paper's mIoU in percent, as text or for each number of EM iterations at evaluation;
without a note it is of ResNet-50, trained at stride 16, evaluated at 8, batch 12.
"""

# Scale -> recipe.
SCALES = {'paper': 'voc_r50', 'short': 'ablation_short', 'laptop': 'ablation_laptop'}
HALF = 'half'

# Figure 4, mIoU in percent: [T in training][T at evaluation]. The paper prints only the
# upper triangle.
FIGURE_4 = {
    1: {1: 77.34, 2: 77.52, 3: 77.60, 4: 77.59, 5: 77.59, 6: 77.59, 7: 77.59, 8: 77.59},
    2: {2: 77.75, 3: 78.04, 4: 78.15, 5: 78.15, 6: 78.12, 7: 78.12, 8: 78.17},
    3: {3: 78.52, 4: 78.80, 5: 78.86, 6: 78.88, 7: 78.89, 8: 78.88},
    4: {4: 78.14, 5: 78.25, 6: 78.27, 7: 78.28, 8: 78.27},
    5: {5: 77.70, 6: 77.76, 7: 77.82, 8: 77.86},
    6: {6: 77.85, 7: 77.91, 8: 77.92},
    7: {7: 77.11, 8: 77.14},
    8: {8: 77.24}}

EXPERIMENTS = {
    'bases': {
        'about': 'How the initial bases are updated (section 5.2, figure 3 left). '
                 'Back-propagation needs the gradient through all iterations, which '
                 'trains the first convolution too.',
        'paper_says': 'The moving average is best for every number of iterations, by '
                      'at least 0.9; back-propagation is no better than no updating, '
                      'and worse from T = 3 on.',
        'variants': {
            'moving average': {},
            'back-propagation': {'EM_UPDATE': 'back_propagation',
                                 'EM_GRADIENT': 'full'},
            'no updating': {'EM_UPDATE': 'never'}},
        'paper': {'moving average': FIGURE_4[3]},
    },
    'normalisation': {
        'about': 'The normalisation of the bases after each iteration (section 5.3, '
                 'figure 3 right).',
        'paper_says': 'LayerNorm is worse than no normalisation; L2 gains with the '
                      'iterations and is best from T = 3 on; the others hardly depend '
                      'on them.',
        'variants': {
            'L2': {},
            'LayerNorm': {'EM_NORM': 'layer_norm'},
            'none': {'EM_NORM': 'none'}},
        'paper': {'L2': FIGURE_4[3]},
    },
    'iterations': {
        'about': 'EM iterations in training and at evaluation (figure 4): one training '
                 'per row, whose checkpoint is evaluated with every number.',
        'paper_says': 'More iterations at evaluation never harm and soon change '
                      'nothing; in training three are best.',
        'variants': {f'T = {t}': {'STAGE_NUM': t} for t in FIGURE_4},
        'paper': {f'T = {t}': row for t, row in FIGURE_4.items()},
    },
    'n_bases': {
        'about': 'The number of bases, K.',
        'variants': {f'K = {k}': {'N_BASES': k} for k in (8, 16, 32, 64, 128, 256)},
    },
    'lambda': {
        'about': 'The sharpness of the responsibilities (eq. 12). At infinity the '
                 'iteration is K-means.',
        'variants': {f'lambda = {value:g}': {'EM_LAMBDA': value}
                     for value in (0.5, 1.0, 2.0, 4.0)},
    },
    'kernel': {
        'about': 'The kernel that compares a pixel with a basis (eq. 11).',
        'paper_says': 'The differences are trivial.',
        'variants': {
            'exponential of the dot product': {},
            'dot product': {'EM_KERNEL': 'dot'},
            'Euclidean (RBF)': {'EM_KERNEL': 'euclidean'}},
    },
    'gradient': {
        'about': 'The gradient through the iterations. The paper does not say; the '
                 'released code stops it. With a gradient the first convolution is '
                 'trained, unless it is fixed.',
        'variants': {
            'none': {},
            'last iteration': {'EM_GRADIENT': 'last'},
            'full': {'EM_GRADIENT': 'full'},
            'full, first convolution fixed': {'EM_GRADIENT': 'full',
                                              'EM_CONV1': 'fixed'}},
    },
    'conv1': {
        'about': "The unit's first convolution: random and fixed as in the released "
                 'code, left out, or trained.',
        'variants': {
            'random, fixed': {},
            'absent': {'EM_CONV1': 'absent'},
            'trained (gradient full)': {'EM_GRADIENT': 'full'},
            'absent (gradient full)': {'EM_GRADIENT': 'full', 'EM_CONV1': 'absent'}},
    },
    'loss': {
        'about': 'The number of pixels that the loss is divided by; not in the paper.',
        'variants': {'all pixels of the crops': {},
                     'valid pixels': {'LOSS_NORM': 'valid'}},
    },
    'bias_rate': {
        'about': 'The learning rate of the biases; not in the paper.',
        'variants': {'twice': {'BIAS_LR': 2.0}, 'like the rest': {'BIAS_LR': 1.0}},
    },
    'multi_grid': {
        'about': 'The dilations of the blocks of layer4.',
        'variants': {'1, 2, 4': {'MULTI_GRID': (1, 2, 4)},
                     '1, 1, 1': {'MULTI_GRID': (1, 1, 1)}},
    },
    'bn_momentum': {
        'about': 'The momentum of the batch norms: the share of the new batch.',
        'variants': {str(value): {'BN_MOM': value} for value in (0.0003, 0.003, 0.1)},
    },
    'heads': {
        'about': "Table 1's heads, and the A2 and Non-local blocks of section 6.2.2, "
                 'all under one recipe. For Table 1 itself make them with '
                 '`N_LAYERS=101 STRIDE=8 BATCH_SIZE=16`.',
        'variants': {
            'EMANet': {},
            'EMANet, no fc1': {'FC1_CHANNELS': 0},
            'EMANet, no fc1, half the channels': {'FC1_CHANNELS': 0,
                                                  'HEAD_CHANNELS': HALF},
            'EMANet, T = 1': {'STAGE_NUM': 1},
            'EMANet of mmsegmentation': {'HEAD': 'ema_mmseg'},
            'FCN': {'HEAD': 'fcn'},
            'DeepLabV3': {'HEAD': 'deeplabv3'},
            'DeepLabV3+': {'HEAD': 'deeplabv3plus'},
            'PSANet': {'HEAD': 'psanet'},
            'Non-local': {'HEAD': 'nonlocal'},
            'A2': {'HEAD': 'a2'}},
        'paper': {
            'EMANet': '78.52 (ResNet-50)',
            'EMANet, no fc1': '80.05 (ResNet-101, stride 8)',
            'EMANet, no fc1, half the channels':
                '79.73 (EMANet(256), ResNet-101, stride 8)',
            'EMANet, T = 1': '77.34 (ResNet-50)',
            'DeepLabV3': '78.51 (ResNet-101, stride 8)',
            'DeepLabV3+': '79.35 (ResNet-101, stride 8)',
            'PSANet': '78.51 (ResNet-101, stride 8)',
            'Non-local': '77.78 (ResNet-50)',
            'A2': '77.41 (ResNet-50)'},
    },
}
