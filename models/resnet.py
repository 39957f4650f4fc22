"""torchvision's residual networks (He et al., 2016), with the names of its weights, for images of ImageNet's kind."""
from torchvision.models import resnet

from models.layers import BatchNorm2d


class ResNet(resnet.ResNet):
    """ResNet-18 has 11,689,512 parameters at 1,000 classes and features (B, 512), ResNet-50 25,557,032 and (B, 2048).

    The first layers shrink an image to a quarter: made for 224x224, and less apt the smaller the images.
    """

    def __init__(self, num_classes, depth):
        block, layers = {18: (resnet.BasicBlock, [2, 2, 2, 2]), 50: (resnet.Bottleneck, [3, 4, 6, 3])}[depth]
        super().__init__(block, layers, num_classes, norm_layer=BatchNorm2d)

    @property
    def classifier(self):
        return self.fc

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.features(x))
