"""A sample of the gateways' choices.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "choices",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        sa.Column("gateway_id", sa.String, nullable=False),
        sa.Column("epoch", sa.String, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("chosen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("request_class", sa.String, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("pool", sa.String, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
        sa.Column("decided_by", sa.String, nullable=False),
        sa.Column("queue_ms", sa.Double, nullable=False),
        sa.Column("speaks_for", sa.BigInteger, nullable=False),
        sa.Column("alternatives", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_choices"),
        sa.UniqueConstraint("gateway_id", "epoch", "number", name="uq_choices"),
    )
    op.create_index("ix_choices_chosen_at", "choices", ["chosen_at"])


def downgrade() -> None:
    op.drop_table("choices")
