from tests.pallas_kernels.softmax.suite import Suite


class TestReference(Suite):
    implementation = "reference"
