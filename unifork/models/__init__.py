"""One model, many architectures: plans, routes and masks; the decoder, the image head, sampling."""
