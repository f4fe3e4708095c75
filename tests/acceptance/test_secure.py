"""Secure rounds over RabbitMQ, with processes that are killed in every stage, and with a witness of every byte."""
