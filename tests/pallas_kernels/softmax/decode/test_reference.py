from tests.pallas_kernels.softmax.decode.suite import DecodeSuite


class TestReference(DecodeSuite):
    implementation = "reference"
