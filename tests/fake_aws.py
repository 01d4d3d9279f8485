"""AWS for the test of cluster/gpu.yaml: moto on `ADDRESS:5000`, with one subnet whose addresses machines can be given.

Prints a line of JSON, from instance ids to private addresses, each time that other instances are running.
"""

import json
import sys
import time

import boto3
from moto.server import ThreadedMotoServer

REGION = "us-west-2"


def serve(address: str) -> None:
    """Plays AWS until it is killed."""
    ThreadedMotoServer(address, 5000, verbose=False).start()
    ec2 = boto3.client("ec2", REGION, endpoint_url=f"http://{address}:5000")
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    vpc = ec2.create_vpc(CidrBlock="198.18.0.0/16")["Vpc"]["VpcId"]
    ec2.create_subnet(VpcId=vpc, CidrBlock="198.18.4.0/24", AvailabilityZone=f"{REGION}a")
    before = None
    while True:
        pages = ec2.describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running"]}])
        instances = [instance for page in pages["Reservations"] for instance in page["Instances"]]
        running = {instance["InstanceId"]: instance["PrivateIpAddress"] for instance in instances}
        if running != before:
            print(json.dumps(running), flush=True)
            before = running
        time.sleep(0.2)


if __name__ == "__main__":
    serve(sys.argv[1])
