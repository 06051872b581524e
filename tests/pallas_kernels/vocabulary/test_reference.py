from tests.pallas_kernels.vocabulary.suite import Suite


class TestReference(Suite):
    implementation = "reference"
