from tests.pallas_kernels.lightning_attention.suite import Suite


class TestChunked(Suite):
    implementation = "chunked"
