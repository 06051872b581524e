from tests.pallas_kernels.softmax_attention.suite import Suite


class TestReference(Suite):
    implementation = "reference"
